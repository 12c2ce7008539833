"""Load on a server or on a bundle: requests at their arrival times, and their latencies."""
