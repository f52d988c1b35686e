"""How annotations are checked while the tests run."""

from beartype import BeartypeConf, beartype

# An int passes for a float, as PEP 484 has it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
