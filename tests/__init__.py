"""The tests of lowrank_fast; a package, so that folders of one name as an installed package do not shadow it."""
