"""Several processes that run one program: how they meet, agree and end."""
