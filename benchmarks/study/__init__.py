"""Does flatness go with generalization? Train many models, measure all of them, report what the numbers say."""
