"""The bundled miniature world: pictures of shapes, captions, a judge, and models small enough for a laptop."""
