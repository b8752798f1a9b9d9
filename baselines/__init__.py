"""CAM generators that come with vpl_lightning, registered through the same door as anybody's."""
