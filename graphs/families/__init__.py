"""Model families: one file per family, each with its configuration, module and checkpoint keys."""
