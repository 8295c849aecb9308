"""The main job as a newcomer sees it: apply examples/who-are-you/ to a real cluster and talk to what comes out."""
