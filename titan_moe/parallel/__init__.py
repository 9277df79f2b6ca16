"""How a model with our layers is placed on a mesh, and how its first weights are drawn there."""
