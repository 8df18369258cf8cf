package authority

import (
	"context"
	"fmt"
	"reflect"
	"time"

	"cal/approval"
	"cal/approval/client"
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

// After makes the task for an ask that others have granted before. All who approve sign the same
// bounds, to the millisecond of their end, so who follows takes over those of the first if their own
// choice is for the same, and for no less time; they are shown before they are signed.
func (c TaskChoice) After(ask nucleus.AskRequest, before []client.Given, now int64) (*nucleus.Task, error) {
	task, err := c.Of(ask, now)
	if err != nil || len(before) == 0 {
		return task, err
	}
	first := before[0]
	switch theirs := first.Task; {
	case theirs == nil:
		return nil, fmt.Errorf("%s granted this ask once, and all who approve choose the same: leave --uses out", first.Approver)
	case theirs.Uses != task.Uses:
		return nil, fmt.Errorf("%s granted this ask for %d uses, and all who approve choose the same: --uses %d", first.Approver, theirs.Uses, theirs.Uses)
	case theirs.Exposure != task.Exposure || !reflect.DeepEqual(theirs.Match, task.Match):
		return nil, fmt.Errorf("%s granted this ask for another pattern, and all who approve choose the same:\n%s", first.Approver, approval.DrawTask(ask.Action.Op, *theirs, approval.View{}))
	case theirs.Until > task.Until:
		return nil, fmt.Errorf("%s granted this ask until %s, which is %v from now and longer than --for %v", first.Approver,
			time.UnixMilli(theirs.Until).UTC().Format("15:04:05 MST"), (time.Duration(theirs.Until-now) * time.Millisecond).Round(time.Second), c.Life)
	}
	return first.Task, approval.CheckTask(ask, *first.Task, now)
}

// chooseTask makes the task that a person chooses, and says when it is one that was granted before.
func (p *Prompt) chooseTask(ctx context.Context, c *client.Client, ask nucleus.AskRequest, choice TaskChoice) (*nucleus.Task, error) {
	status, err := c.Status(ctx, ask.ID)
	if err != nil {
		return nil, err
	}
	task, err := choice.After(ask, status.Grants, time.Now().UnixMilli())
	if err == nil && len(status.Grants) > 0 {
		err = p.print("%s has granted this ask as a task; you are asked for the same bounds, which end when theirs do.\n", approval.Visible(status.Grants[0].Approver))
	}
	return task, err
}
