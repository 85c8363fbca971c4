"""The layers and building blocks of networks; all arrays have their channels last."""
