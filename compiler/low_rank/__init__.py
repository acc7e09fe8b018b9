"""A weight as a quantized residual and a float branch of low rank beside it."""
