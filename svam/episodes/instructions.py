"""An English instruction for each of MetaWorld's 50 tasks: training paraphrases, and one held out for evaluation.

A held-out paraphrase is a sentence that no training sees, made only of words that the same task's training paraphrases
contain: what it tests is the wording, not an unknown word. Directions of turning are as seen from above and as the simulator
moves (opening the faucet turns it counter-clockwise); MetaWorld's own list of descriptions has the two faucets confused.
"""

from __future__ import annotations

from collections.abc import Mapping

from svam.errors import ParamsError

# task -> training paraphrases, then, last, the held-out one.
_TABLE: Mapping[str, tuple[str, ...]] = {
    "assembly": (
        "pick up the nut and place it onto the peg",
        "put the ring of the nut over the peg",
        "lift the nut and drop it over the peg",
        "assemble the nut and the peg",
        "pick up the ring and put it onto the peg",
    ),
    "basketball": (
        "dunk the basketball into the basket",
        "put the ball through the hoop",
        "pick up the basketball and drop it into the hoop",
        "throw the ball into the basket",
        "pick up the ball and put it into the basket",
    ),
    "bin-picking": (
        "move the block from one bin to the other bin",
        "pick up the block and place it in the other bin",
        "take the block out of its bin and put it in the next one",
        "transfer the block to the second bin",
        "take the block and place it in the second bin",
    ),
    "box-close": (
        "close the box with its lid",
        "put the lid on the box",
        "grasp the cover and place it on top of the box",
        "pick up the lid and cover the box",
        "grasp the lid and put it on top of the box",
    ),
    "button-press": (
        "press the button",
        "push the button on the side of the box",
        "push in the red button",
        "move forward and press the red button in",
        "push the red button on the box",
    ),
    "button-press-topdown": (
        "press the button from above",
        "push the button down",
        "press down on the red button on top of the box",
        "move down and push the red button",
        "press the red button from above",
    ),
    "button-press-topdown-wall": (
        "go over the wall and press the button from above",
        "press the button down behind the wall",
        "push down the red button that is behind the wall",
        "avoid the wall and push the button from above",
        "go over the wall and push down the red button",
    ),
    "button-press-wall": (
        "go around the wall and press the button",
        "push the button behind the wall",
        "press the red button that is behind the wall",
        "avoid the wall and push the button in",
        "go around the wall and push the red button in",
    ),
    "coffee-button": (
        "press the button of the coffee machine",
        "push the button on the coffee maker",
        "start the coffee machine with its button",
        "push in the button to make coffee",
        "press the button to start the coffee maker",
    ),
    "coffee-pull": (
        "pull the mug away from the coffee machine",
        "take the mug out from under the coffee machine",
        "drag the cup away from the coffee maker",
        "pull the cup to the goal",
        "drag the mug away from the coffee machine",
    ),
    "coffee-push": (
        "push the mug under the coffee machine",
        "slide the cup under the coffee maker",
        "move the mug to the coffee machine",
        "push the cup to the goal",
        "slide the mug under the coffee machine",
    ),
    "dial-turn": (
        "turn the dial",
        "rotate the dial half a turn",
        "rotate the knob on the table",
        "turn the knob around",
        "rotate the dial on the table around",
    ),
    "disassemble": (
        "pick the nut off the peg",
        "lift the nut up and away from the peg",
        "take the ring of the nut off the peg",
        "remove the nut from the peg",
        "lift the ring off the peg",
    ),
    "door-close": (
        "close the door",
        "push the door shut",
        "shut the door by its handle",
        "swing the door until it is closed",
        "push the door until it is shut",
    ),
    "door-lock": (
        "lock the door",
        "turn the lock down to lock the door",
        "rotate the lock of the door until it is locked",
        "push the lock down",
        "rotate the lock down to lock the door",
    ),
    "door-open": (
        "open the door",
        "pull the door open by its handle",
        "grasp the handle and swing the door open",
        "pull on the handle to open the door",
        "grasp the door by its handle and swing open the door",
    ),
    "door-unlock": (
        "unlock the door",
        "turn the lock up to unlock the door",
        "rotate the lock of the door until it is unlocked",
        "push the lock to the side to unlock the door",
        "rotate the lock to unlock the door",
    ),
    "drawer-close": (
        "close the drawer",
        "push the drawer shut",
        "push the green drawer in",
        "shut the drawer by pushing its handle",
        "push the green drawer shut",
    ),
    "drawer-open": (
        "open the drawer",
        "pull the drawer open",
        "pull the green drawer out by its handle",
        "grasp the handle and open the drawer",
        "pull the handle and open the green drawer",
    ),
    "faucet-close": (
        "close the faucet",
        "turn the faucet clockwise",
        "shut the tap off by its handle",
        "rotate the handle of the faucet clockwise",
        "turn the handle of the tap clockwise",
    ),
    "faucet-open": (
        "open the faucet",
        "turn the faucet counter-clockwise",
        "turn the tap on by its handle",
        "rotate the handle of the faucet counter-clockwise",
        "turn the handle of the tap counter-clockwise",
    ),
    "hammer": (
        "hammer the nail into the wall",
        "pick up the hammer and hit the nail",
        "grasp the hammer and drive the nail in",
        "hit the nail with the hammer",
        "grasp the hammer and hit the nail into the wall",
    ),
    "hand-insert": (
        "insert the gripper into the hole",
        "put the hand into the hole in the table",
        "move the gripper down into the hole",
        "lower the hand into the hole",
        "move the hand down into the hole in the table",
    ),
    "handle-press": (
        "press the handle down",
        "push the handle down from above",
        "press down on the red handle",
        "move the lever of the box down",
        "push down on the red handle of the box",
    ),
    "handle-press-side": (
        "press the handle down sideways",
        "push down the handle at the side",
        "press down on the red handle at the side",
        "move the side handle down",
        "push the red side handle down",
    ),
    "handle-pull": (
        "pull the handle up",
        "lift the handle from below",
        "raise the red handle",
        "pull up on the handle of the box",
        "lift up the red handle of the box",
    ),
    "handle-pull-side": (
        "pull the handle up sideways",
        "lift the handle at the side",
        "raise the red handle at the side",
        "pull the side handle up",
        "lift the red side handle up",
    ),
    "lever-pull": (
        "pull the lever up",
        "lift the lever",
        "raise the lever until it is up",
        "rotate the lever up from below",
        "lift the lever up from below",
    ),
    "peg-insert-side": (
        "insert the peg into the hole",
        "put the peg into the hole at the side of the box",
        "pick up the peg and slide it sideways into the box",
        "grasp the peg and insert it sideways",
        "pick up the peg and insert it into the hole at the side",
    ),
    "peg-unplug-side": (
        "unplug the peg",
        "pull the peg out of the hole",
        "remove the plug from the box",
        "grasp the plug and pull it out sideways",
        "grasp the peg and pull it out of the box",
    ),
    "pick-out-of-hole": (
        "pick the puck out of the hole",
        "lift the puck up from the hole",
        "take the block out of the hole and raise it to the goal",
        "grasp the block in the hole and lift it",
        "grasp the puck and lift it out of the hole",
    ),
    "pick-place": (
        "pick up the puck and place it at the goal",
        "lift the puck to the target",
        "grasp the block and carry it to the goal",
        "pick up the block and hold it at the target",
        "grasp the puck and carry it to the target",
    ),
    "pick-place-wall": (
        "pick up the puck, lift it over the wall and place it at the goal",
        "carry the puck over the wall to the target",
        "grasp the block and move it over the wall",
        "bring the block to the goal behind the wall",
        "grasp the puck and carry it over the wall to the goal",
    ),
    "plate-slide": (
        "slide the plate into the net",
        "push the puck forward into the goal",
        "slide the puck to the goal",
        "push the plate forward into the net",
        "slide the puck forward into the net",
    ),
    "plate-slide-back": (
        "slide the plate back",
        "pull the plate out of the net",
        "pull the puck back to the goal",
        "slide the puck out of the net",
        "pull the plate back out of the net",
    ),
    "plate-slide-back-side": (
        "slide the plate back to the side",
        "pull the plate sideways out of the net",
        "move the puck back out of the side net",
        "slide the puck sideways away from the net",
        "pull the puck sideways out of the net",
    ),
    "plate-slide-side": (
        "slide the plate to the side",
        "push the plate sideways into the net",
        "move the puck into the net at the side",
        "slide the puck sideways to the goal",
        "push the puck sideways into the net",
    ),
    "push": (
        "push the puck to the goal",
        "slide the puck to the target on the table",
        "move the block along the table to the goal",
        "push the block to the target",
        "slide the block along the table to the target",
    ),
    "push-back": (
        "push the block back to the goal",
        "pull the block back along the table",
        "slide the block backwards to the target",
        "bring the block back to the target",
        "slide the block back along the table to the goal",
    ),
    "push-wall": (
        "push the puck around the wall to the goal",
        "slide the puck past the wall to the target",
        "move the block around the wall",
        "push the block to the goal behind the wall",
        "slide the block around the wall to the goal",
    ),
    "reach": (
        "reach the goal",
        "move the gripper to the red point",
        "move the hand to the target",
        "bring the gripper to the goal position",
        "bring the hand to the red target",
    ),
    "reach-wall": (
        "reach the goal behind the wall",
        "move the gripper over the wall to the red point",
        "avoid the wall and move the hand to the target",
        "bring the gripper past the wall to the goal",
        "bring the hand over the wall to the red target",
    ),
    "shelf-place": (
        "pick up the block and place it on the shelf",
        "put the block onto the shelf",
        "grasp the cube and set it on the shelf",
        "lift the cube to the shelf",
        "grasp the block and put it on the shelf",
    ),
    "soccer": (
        "kick the ball into the goal",
        "push the soccer ball into the goal",
        "score with the ball",
        "move the soccer ball to the net",
        "push the ball into the net",
    ),
    "stick-pull": (
        "grasp the stick and pull the bottle with it",
        "pull the thermos with the stick",
        "pick up the stick and drag the bottle to the goal",
        "use the stick to pull the thermos by its handle",
        "use the stick to drag the thermos to the goal",
    ),
    "stick-push": (
        "grasp the stick and push the bottle with it",
        "push the thermos with the stick",
        "pick up the stick and push the bottle to the goal",
        "use the stick to move the thermos along the table",
        "use the stick to push the thermos to the goal",
    ),
    "sweep": (
        "sweep the block off the table",
        "push the block over the edge of the table",
        "move the cube to the side and off the table",
        "sweep the cube to the side",
        "push the cube off the edge of the table",
    ),
    "sweep-into": (
        "sweep the block into the hole",
        "push the block into the hole in the table",
        "slide the cube across the table into the hole",
        "move the cube into the hole",
        "sweep the cube across the table into the hole",
    ),
    "window-close": (
        "close the window",
        "slide the window shut",
        "push the window by its handle to close it",
        "move the handle to the left to shut the window",
        "slide the handle to the left to close the window",
    ),
    "window-open": (
        "open the window",
        "slide the window open",
        "push the window by its handle to open it",
        "move the handle to the right to open the window",
        "slide the handle to the right to open the window",
    ),
}


def instructions_of(task: str) -> dict[str, list[str]]:
    """`{"train": [several sentences], "held_out": [one sentence]}` of MetaWorld task `task` (name without version).

    Raises:
        ValueError: the table has no such task.
    """
    if task not in _TABLE:
        raise ParamsError(f"no instruction for task {task!r}: the table knows {', '.join(sorted(_TABLE))}")
    *train, held_out = _TABLE[task]
    return {"train": train, "held_out": [held_out]}


def described_tasks() -> list[str]:
    """The tasks that have instructions, sorted."""
    return sorted(_TABLE)
