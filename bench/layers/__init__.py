"""One decoder layer's operations, each in the ways that are compared: one registry for timing and for the roofline."""
