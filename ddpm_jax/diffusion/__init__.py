"""The paper's sections 2 and 3: schedules, the process, the bound and losses; also the probability-flow ODE."""
