"""The texts that routers are trained on: steps, and what becomes of them."""
