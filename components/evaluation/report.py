def render(record, density, earlier):
    return ""
