"""One attention call: its layout and masks, whether it is sparse, its share of several devices."""
