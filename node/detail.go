package node

import (
	"context"
	"fmt"
	"strings"

	"cal/guest"
	"cal/guest/tools"
	"cal/internal/git"
	"cal/nucleus"
)

// What a person is shown beside the values that are signed. It is the node's own word; what
// it says of a file is held to the digests of the action.

const maxDiff = 256 << 10 // bytes of a difference that is shown

// cutDetail shortens a text that is shown, with the digest of the whole.
func cutDetail(text string, limit int) string {
	if len(text) <= limit {
		return cut(text, limit)
	}
	return cut(text, limit) + fmt.Sprintf("\nshown in part: the whole has %d bytes and SHA-256 %s", len(text), nucleus.SHA256([]byte(text)))
}

// fileDetail is the difference that a call makes to a file which is there. Both sides have
// the digests of the action, or nothing is shown as a difference. What is written to a new
// file stands among the arguments that the requester signed.
func (n *Node) fileDetail(ctx context.Context, p *Pod, r request, action nucleus.Action) []nucleus.Detail {
	if r.op != nucleus.WriteFiles && r.op != nucleus.EditFiles || len(action.Files) != 1 || action.Files[0].Before == "" {
		return nil
	}
	file := action.Files[0]
	text, err := n.fileDiff(ctx, p, r, file)
	if err != nil {
		text = "cannot be shown: " + err.Error()
	}
	return []nucleus.Detail{{Title: "diff of " + file.Path, Text: cutDetail(text, maxDiff)}}
}

func (n *Node) fileDiff(ctx context.Context, p *Pod, r request, file nucleus.File) (string, error) {
	args, err := nucleus.CanonicalJSON(r.args)
	if err != nil {
		return "", err
	}
	header := r.call
	header.Op, header.Resolve, header.Standing = r.op, true, true
	result, err := p.call(ctx, header, nil, guest.CallArgs{Args: tools.Args{Args: args}}, nil)
	switch {
	case err != nil:
		return "", err
	case result.Error != nil:
		return "", result.Error
	case nucleus.SHA256(result.Standing) != file.Before:
		return "", fmt.Errorf("the machine does not show what the file holds now (it is longer than 1 MiB, or has changed)")
	}
	after, err := changed(r.op, args, string(result.Standing))
	if err != nil {
		return "", err
	}
	if nucleus.SHA256([]byte(after)) != file.After {
		return "", fmt.Errorf("the machine says that the file will have the digest %s, what was asked for gives %s", file.After, nucleus.SHA256([]byte(after)))
	}
	return git.Difference(ctx, p.dir, result.Standing, []byte(after))
}

// changed is what a file holds after a call.
func changed(op nucleus.Op, args []byte, before string) (string, error) {
	decoded, err := tools.Decode(op, args)
	if err != nil {
		return "", err
	}
	switch a := decoded.(type) {
	case tools.WriteArgs:
		return a.Content, nil
	case tools.EditArgs:
		return strings.ReplaceAll(before, a.Old, a.New), nil
	}
	return "", fmt.Errorf("%s changes no file", op)
}
