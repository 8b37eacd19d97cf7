"""What a run takes before it starts: memory, bytes, layouts that fit, a trial of its worst step."""
