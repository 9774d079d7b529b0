/* The CUDA runtime as far as ONNX Runtime needs it to load a model: memory is the host's, kernels do nothing. What it is asked for
   goes line by line to the file that STAND_IN_LOG names. Functions that are not here return 0 (see onnxruntime_cuda_kernels.py). */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GIB (1ull << 30)
#define BLOCKS 100000

/* cudaDeviceProp of CUDA 13, as far as multiProcessorCount; the whole takes 1008 bytes at least. */
typedef struct {
    char name[256], uuid[16], luid[8];
    unsigned luid_node_mask;
    size_t total_memory, shared_per_block;
    int registers_per_block, warp_size;
    size_t pitch;
    int threads_per_block, threads_dim[3], grid_size[3];
    size_t constant_memory;
    int major, minor;
    size_t texture_alignment, texture_pitch;
    int multiprocessors;
} Properties;

static struct { char *start; size_t size; } blocks[BLOCKS];
static int block_count, capturing;
static long launches;
static uintptr_t handles = 0x1000;

static void say(const char *format, ...) {
    static FILE *file;
    va_list arguments;
    if (!file) {
        const char *path = getenv("STAND_IN_LOG");
        file = fopen(path ? path : "/dev/null", "a");
        setvbuf(file, NULL, _IOLBF, 0);
    }
    va_start(arguments, format);
    if (capturing) fputs("captured ", file);
    vfprintf(file, format, arguments);
    fputc('\n', file);
    va_end(arguments);
}

static int new_handle(void **handle) { *handle = (void *)(handles += 16); return 0; }

static int new_memory(void **address, size_t size) { return posix_memalign(address, 256, size ? size : 1); }

static int on_device(const void *address) {
    for (int i = 0; i < block_count; i++)
        if ((char *)address >= blocks[i].start && (char *)address < blocks[i].start + blocks[i].size) return 1;
    return 0;
}

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13010; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaMemGetInfo(size_t *free, size_t *total) { *free = 79 * GIB; *total = 80 * GIB; return 0; }
const char *cudaGetErrorString(int error) { return "an error of the stand-in"; }
const char *cudaGetErrorName(int error) { return "standInError"; }

int cudaGetDeviceProperties(Properties *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "stand-in");
    p->total_memory = 80 * GIB, p->shared_per_block = 49152, p->registers_per_block = 65536, p->warp_size = 32;
    p->pitch = 1 << 30, p->threads_per_block = 1024, p->constant_memory = 65536;
    p->threads_dim[0] = p->threads_dim[1] = 1024, p->threads_dim[2] = 64;
    p->grid_size[0] = 0x7fffffff, p->grid_size[1] = p->grid_size[2] = 65535;
    p->major = 9, p->minor = 0, p->multiprocessors = 132;
    return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: *value = 1024; break;      /* threads of a block */
    case 16: *value = 132; break;      /* multiprocessors */
    case 75: *value = 9; break;        /* compute capability */
    case 76: *value = 0; break;
    case 81: *value = 233472; break;   /* shared memory of a multiprocessor */
    case 97: *value = 232448; break;   /* and of a block */
    default: *value = 1;
    }
    return 0;
}

int cudaMalloc(void **address, size_t size) {
    say("allocate %zu", size);
    if (block_count == BLOCKS || new_memory(address, size)) return 2;
    blocks[block_count].start = *address;
    blocks[block_count++].size = size;
    return 0;
}
int cudaMallocFromPoolAsync(void **address, size_t size) { return cudaMalloc(address, size); }
int cudaMallocHost(void **address, size_t size) { return new_memory(address, size); }
int cudaHostAlloc(void **address, size_t size) { return new_memory(address, size); }
int cudaFreeHost(void *address) { free(address); return 0; }
int cudaFree(void *address) {
    say("free");
    for (int i = 0; i < block_count; i++)
        if (blocks[i].start == address) {
            free(address);
            blocks[i] = blocks[--block_count];
            break;
        }
    return 0;
}
int cudaFreeAsync(void *address) { return cudaFree(address); }

static const char *const kinds[] = {"host to host", "host to device", "device to host", "device to device", "any"};
int cudaMemcpy(void *target, const void *source, size_t size, int kind) {
    say("copy and wait %s %zu", kinds[kind], size);
    memcpy(target, source, size);
    return 0;
}
int cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, void *stream) {
    say("copy %s %zu", kinds[kind], size);
    memcpy(target, source, size);
    return 0;
}
int cudaMemset(void *target, int value, size_t size) { memset(target, value, size); return 0; }
int cudaMemsetAsync(void *target, int value, size_t size) { return cudaMemset(target, value, size); }

int cudaPointerGetAttributes(int *attributes, const void *address) {
    memset(attributes, 0, 24);
    attributes[0] = on_device(address) ? 2 : 0;
    memcpy(attributes + 2, &address, sizeof address);
    memcpy(attributes + 4, &address, sizeof address);
    return 0;
}

int cudaStreamCreate(void **stream) { return new_handle(stream); }
int cudaStreamCreateWithFlags(void **stream) { return new_handle(stream); }
int cudaStreamSynchronize(void *stream) { say("wait for %s", stream ? "a stream" : "the default stream"); return 0; }
int cudaDeviceSynchronize(void) { say("wait for the device"); return 0; }
int cudaEventCreate(void **event) { return new_handle(event); }
int cudaEventCreateWithFlags(void **event) { return new_handle(event); }
int cudaEventSynchronize(void *event) { say("wait for an event"); return 0; }
int cudaEventElapsedTime(float *milliseconds) { *milliseconds = 1; return 0; }

int cudaStreamBeginCapture(void *stream) { say("begin capture"); capturing = 1; launches = 0; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) {
    capturing = 0;
    say("end capture: %ld launches", launches);
    return new_handle(graph);
}
int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
int cudaGraphInstantiate(void **executable) { return new_handle(executable); }
int cudaGraphLaunch(void *executable, void *stream) { say("launch graph"); return 0; }

static int launch(void) { launches++; return 0; }
int cudaLaunchKernel(void) { return launch(); }
int cudaLaunchKernelExC(void) { return launch(); }
int cudaLaunchCooperativeKernel(void) { return launch(); }
int __cudaLaunchKernel(void) { return launch(); }
int __cudaPopCallConfiguration(void *grid, void *block, size_t *shared, void **stream) {
    memset(grid, 0, 12);
    memset(block, 0, 12);
    *shared = 0, *stream = NULL;
    return 0;
}
int __cudaGetKernel(void **kernel, void *function) { *kernel = function; return 0; }
void **__cudaRegisterFatBinary(void *binary) { static void *handle[2]; return handle; }
int cudaFuncGetAttributes(int *attributes) { memset(attributes, 0, 64); attributes[6] = 1024; return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { *blocks = 2; return 0; }
int cudaMemPoolCreate(void **pool) { return new_handle(pool); }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, uint64_t flags, int *found) {
    *function = (void *)launch;
    if (found) *found = 0;
    return 0;
}
