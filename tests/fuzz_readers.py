"""All readers of files that are fuzzed."""

from tests import fuzz_model_readers, fuzz_table_readers

READERS = {reader.name: reader for reader in (*fuzz_model_readers.READERS, *fuzz_table_readers.READERS)}
