"""python -m ddpm_jax is the console command ddpm-jax."""

from ddpm_jax.commands.cli import main

if __name__ == "__main__":
    main()
