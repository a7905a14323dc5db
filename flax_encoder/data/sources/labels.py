"""Labels that are spelled in two ways: found before they become two classes."""


class LabelCheck:
    """Collects the names of labels while they are read, and tells which are likely meant as one.

    `add` each label with its record's `where`; then `problems()` has a sentence for each pair of spellings, which
    names a record of each. Memory is that of the distinct names.
    """

    _MEANINGS = (("true", "1", "yes"), ("false", "0", "no"))

    def __init__(self):
        self._first: dict[str, str] = {}

    def add(self, name: str, where: str) -> None:
        self._first.setdefault(name, where)

    def problems(self) -> list[str]:
        """Names that differ only by blanks or by upper and lower case, and 0 and 1 beside false and true."""
        found, groups = [], {}
        for name in self._first:
            groups.setdefault(" ".join(name.split()).casefold(), []).append(name)
        for names in groups.values():
            if len(names) > 1:
                found.append(f"labels that differ only by blanks or case are different classes: {self._places(names)}.")
        truths = [[groups[key][0] for key in keys if key in groups] for keys in self._MEANINGS]
        for names in truths:
            if len(names) > 1:
                found.append(f"labels that mean the same are different classes: {self._places(names)}.")
        return found

    def _places(self, names: list[str]) -> str:
        return " and ".join(f"{name!r} ({self._first[name] or 'no place'})" for name in names)
