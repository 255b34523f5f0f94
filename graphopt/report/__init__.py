"""What happened and why: as a document (JSON) and as text for a terminal."""
