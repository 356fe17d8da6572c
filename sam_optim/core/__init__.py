"""The foundation of the other rooms; needs only torch."""
