"""stub"""


def write_report(facts, plots):
    pass
