package wire

import "github.com/hashicorp/yamux"

var yamuxClient = yamux.Client
