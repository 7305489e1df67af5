"""What is measured on this machine, what is remembered of it, and what is predicted from it."""
