"""Two runs compared: bitwise, within tolerance, or different from where on. docs/numerics.md."""
