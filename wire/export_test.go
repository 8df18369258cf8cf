package wire

import "github.com/hashicorp/yamux"

var yamuxClient, yamuxServer = yamux.Client, yamux.Server
