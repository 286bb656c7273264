"""How drafters, trees and what they take are named on a command line."""
