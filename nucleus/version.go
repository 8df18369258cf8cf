package nucleus

// Version of the programs and of what they say to one another. A node and a
// proxy, or a cal and a node, of different versions do not work together.
const Version = "0.1.0"
