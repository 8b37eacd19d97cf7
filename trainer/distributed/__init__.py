"""What ranks do together: meet, agree, move experts, and end."""
