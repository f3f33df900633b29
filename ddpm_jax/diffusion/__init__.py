"""The paper's sections 2 and 3: schedules, the process and what a network predicts of it, the bound, losses, the ODE."""
