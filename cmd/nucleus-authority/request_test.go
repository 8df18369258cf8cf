package main

import (
	"encoding/json"
	"testing"

	"cal/authority"
	"cal/nucleus"
)

func signedRequest(t *testing.T, pod string, op nucleus.Op, args []byte) json.RawMessage {
	s, err := nucleus.Sign(requester, "tmp", authority.Requested{Pod: pod, Op: op, Args: nucleus.SHA256(args)})
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := nucleus.Canonical(s)
	return raw
}
