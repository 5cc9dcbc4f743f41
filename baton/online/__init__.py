"""Online training on warm servers: rollouts in, weights out, steps that go on after any death."""
