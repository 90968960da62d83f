"""The sections of the page, one module and one template each; each is a function of a View."""
