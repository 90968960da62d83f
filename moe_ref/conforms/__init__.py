"""One line in somebody else's test file: assert_conforms."""
