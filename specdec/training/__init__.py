"""What is trained, and what it is trained on: exits and routers. Nothing that runs imports it."""
