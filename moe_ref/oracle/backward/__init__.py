"""The oracle backward: gradients by written-out formulas, to be read beside docs/backward.md."""
