"""What every wing may use: failures, files, random draws, room, the devices and processes of a run."""
