"""One page of HTML that opens without a network."""
def make_page(report): return ""
