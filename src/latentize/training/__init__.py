"""What is learnt: one descent, the refinement of a layer, and the polish of a whole model."""
