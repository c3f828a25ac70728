"""Where Hessian products come from, and how they become an estimate of the Hessian's diagonal."""
