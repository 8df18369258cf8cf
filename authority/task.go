package authority

import (
	"fmt"
	"time"

	"cal/approval"
	"cal/nucleus"
)

// TaskChoice is a task as a person chooses it. Match widens the narrowest pattern in the one part
// that can be wider: the ref of a push, the path of a request, the directory of files, or the
// arguments of a command; empty leaves it as it was asked for.
type TaskChoice struct {
	Uses  int
	Life  time.Duration
	Match []string
}

// Of makes the task for an ask, at a time in Unix milliseconds.
func (c TaskChoice) Of(ask nucleus.AskRequest, now int64) (*nucleus.Task, error) {
	match, err := approval.Narrowest(ask)
	if err != nil {
		return nil, err
	}
	task := &nucleus.Task{Uses: c.Uses, Until: now + c.Life.Milliseconds(), Exposure: approval.Told(ask), Match: match}
	if len(c.Match) > 0 {
		var one *string
		switch {
		case match.Push != nil:
			one = &match.Push.Ref
		case match.Fetch != nil:
			one = &match.Fetch.Path
		case match.Files != nil:
			one = &match.Files.Root
		case match.Command != nil:
			match.Command.Argv = c.Match
		}
		switch {
		case one == nil && match.Command == nil:
			return nil, fmt.Errorf("a task of %s is for exactly this host and port", ask.Action.Op)
		case one != nil && len(c.Match) != 1:
			return nil, fmt.Errorf("a task of %s has one pattern, %d were given", ask.Action.Op, len(c.Match))
		case one != nil:
			*one = c.Match[0]
		}
	}
	return task, approval.CheckTask(ask, *task, now)
}
