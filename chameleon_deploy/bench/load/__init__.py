"""Load on a server or on a bundle: requests as they arrive, and what each of them waited for."""
