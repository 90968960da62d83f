"""The command line `moe-ref`; heavy modules are imported by the verb that needs them."""
