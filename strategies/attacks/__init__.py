"""Attacks for simulations: what colluders send who see all updates, and who of the clients attacks when."""
