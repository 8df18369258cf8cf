package main

import (
	"crypto/ed25519"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"cal/authority"
	"cal/nucleus"
	"cal/wire"
)

// requested reads what the holder of key asked of the node in the signed request
// of an ask: POST /v1/pods/POD/tools/OPERATION with the arguments as its body.
func requested(ask nucleus.AskRequest, key ed25519.PublicKey) (authority.Requested, error) {
	fail := func(err error) (authority.Requested, error) { return authority.Requested{}, err }
	var signed wire.SignedRequest
	if err := nucleus.Strict(ask.Request, &signed); err != nil {
		return fail(err)
	}
	if err := signed.Verify(wire.Key{ID: ask.Requester, Ed25519: key}); err != nil {
		return fail(err)
	}
	target, err := url.Parse(signed.TargetURI)
	if err != nil {
		return fail(err)
	}
	// The path as it was signed: an id needs no escapes, so that none is undone.
	part := strings.Split(target.EscapedPath(), "/")
	if signed.Method != http.MethodPost || len(part) != 6 || part[1] != "v1" || part[2] != "pods" || part[4] != "tools" {
		return fail(fmt.Errorf("%s %s is no call of a tool", signed.Method, target.EscapedPath()))
	}
	if signed.Pod != part[3] {
		return fail(fmt.Errorf("it is signed for pod %q, its path names %q", signed.Pod, part[3]))
	}
	args, err := nucleus.CanonicalJSON(signed.Body)
	if err != nil {
		return fail(err)
	}
	op := nucleus.Op(part[5])
	if op == nucleus.NetConnect {
		// These arguments are what is shown, so that a node that shows another place than
		// the machine asked for is found out here.
		var asked nucleus.Connect
		if err := nucleus.Strict(args, &asked); err != nil {
			return fail(err)
		}
		if shown := ask.Action.Connect; shown == nil || *shown != asked {
			return fail(fmt.Errorf("the machine asked for %s port %d, the ask shows %+v", asked.Host, asked.Port, shown))
		}
	}
	return authority.Requested{Pod: part[3], Op: op, Args: nucleus.SHA256(args)}, nil
}
