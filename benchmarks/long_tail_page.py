def draw(*a): pass
def page(*a): return ""
