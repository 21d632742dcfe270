"""Progress bars of long work."""

import time

from tqdm import tqdm


class ProgressBar(tqdm):
    """tqdm on a clock that nobody sets: with that of the calendar, rates and remaining times can become negative."""

    monitor_interval = 0  # its thread compares with the calendar's clock

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{"miniters": 1, **options})
        if not self.disable:
            self._time = time.monotonic
            self.start_t = self.last_print_t = self._time()
