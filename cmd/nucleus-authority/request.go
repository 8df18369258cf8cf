package main

import (
	"cal/authority"
	"cal/nucleus"
)

func requested(ask nucleus.AskRequest, key []byte) (got authority.Requested, err error) {
	var signed nucleus.Signed
	if err := nucleus.Strict(ask.Request, &signed); err != nil {
		return got, err
	}
	return got, signed.Open(key, "tmp", &got)
}
