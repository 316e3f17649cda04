"""What data.py reads out of a completion's reasoning, against what a careful reader does; where its rewards go.

The tables were labelled before any rule had been run on them. Of the first 60 conclusions and 51 accounts of the steps,
the first rules had 52 and 39 right. They were mended, then tried once on fresh ones: 13 of 15 conclusions and 11 of 15
accounts were right; and once more after "it" had come to mean what was named before: 13 of 15 and 15 of 15 others. All
are below. Those that rules still get wrong are in MISSED_CONCLUSIONS and MISSED_ACCOUNTS.
"""
import importlib.util
import itertools
import json
import math
import random
import shutil
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
import grpo_video
import toy
from data import Question, agreement_reward, concluded_option, content_words, process_reward, steps_told
from test_train import eval_args, grpo_args, metrics_of

# ----------------------------------------------------------------------------------------------------------------------
# Tables. A line that begins with a label begins a case, other lines go on with it, and \n is a line break in it. A
# text without tags stands inside <think></think>.

LABELS = {"-", *"ABCDE", *(f"{told}{more}" for told in range(6) for more in ("", " +1", " +2"))}


def read_table(table):
    """-> [(options, or steps and options, then the label, and the text)]"""
    cases = []
    for *key, text in table:
        for line in filter(None, map(str.strip, text.splitlines())):
            label, colon, rest = line.partition(": ")
            if colon and label in LABELS:
                cases.append([*key, label, rest])
            else:
                cases[-1][-1] += " " + line
    return [(*key, text.replace(r"\n", "\n")) for *key, text in cases]


def think(text, answer="A"):
    return text if "<" in text else f"<think>{text}</think><answer>{answer}</answer>"


def example(options=(), steps=(), gold="A"):
    """What the rewards read of an Example."""
    question = Question("1", "", None, None, progress=tuple(steps))
    return SimpleNamespace(question=question, options=tuple(options), gold=gold)


def first_words(value):
    """The name of a case in pytest's output."""
    return value.replace("\n", " ")[:40] if isinstance(value, str) else ""


# Options, and texts by the letter that they conclude with; -: with none.
CONCLUSIONS = [
    (("grab onion", "cut onion", "open drawer", "take knife"), r"""
    A: The person has opened the drawer and taken the knife. The goal is to cut an onion. The next logical step is to
        grab the onion so that it can be cut. Therefore, the correct answer is A.
    B: Let's analyze the options:\nA. grab onion - the onion is already on the board, so this is done.\nB. cut onion -
        the person holds the knife above the onion, so this is the most plausible.\nC. open drawer - there is no need
        for this.\nD. take knife - the knife is already in the hand.\nBased on this analysis, the next action is to
        cut the onion.
    -: The options are:\nA. grab onion\nB. cut onion\nC. open drawer\nD. take knife
    -: The question asks what the person does next. I have to choose between A. grab onion, B. cut onion, C. open
        drawer and D. take knife. The video shows a kitchen with a board.
    D: Among the options, "take knife" makes the most sense, since she needs one to cut the onion.
    D: The next action would be to take the knife (D). After that, they will cut the onion (B).
    B: So A... wait, the onion is already on the board, so it is B.
    A: I first thought of option D, but there is a knife in her left hand already. So the answer must be A.
    B: It can't be A because the onion is already there. It can't be C because the drawer is open. It can't be D
        because he holds the knife. So we are left with B.
    D: A person needs a knife to cut something. In the last frame no knife is visible. **D. take knife** is the best
        choice.
    C: The person is standing in front of the counter, and all drawers are closed. Opening the drawer would be the
        next step.
    B: Option A: The onion has been grabbed. \nOption B: This is the natural continuation. \nOption C: The drawer has
        already been opened. \nOption D: The knife was already taken. \nTherefore Option B is the right answer.
    A: The correct answer is A. C is not needed, since the drawer is already open, and D has been done before.
    -: Both A and D are plausible here, and the video does not tell which of them comes first.
    A: It is either A or D. As the knife is in the frame already, A is more likely.
    B: Not A but B.
    D: The answer is D, not C.
    B: The person in the video opens a drawer, takes a knife out of it, grabs an onion. Now the onion need to be
        cutted. So next action is cut onion.
    C: Looking at the image, a hand reaches for the handle of the drawer. This matches option C.
    A: 1. The person opened the drawer.\n2. The person took the knife.\n3. The person still needs something to
        cut.\n\nThe only option that fits is to grab an onion.
    """),
    (("put pot", "put pot on stove", "open tap", "take sponge"), r"""
    B: The pot is full of water. To boil it, the person has to put the pot on the stove.
    A: The pot is in the person's hand and the stove is covered. The most likely next action is "put pot".
    C: So A... wait, the pot is already full, so it is C.
    B: The person took the pot, filled it with water and closed the tap. The next step is to put the pot on the stove,
        which corresponds to option B.
    D: To clean a pot you need a sponge. A sponge lies beside the sink. I would choose to take the sponge.
    C: The pot is in the sink, empty. "put pot" is already done; "put pot on stove" makes no sense while it is empty;
        "take sponge" is for cleaning. So the remaining option is "open tap".
    B: Step 1: The person takes a pot.\nStep 2: The person opens the tap and fills the pot.\nStep 3: The person closes
        the tap.\nConclusion: put pot on stove.
    A: The best option is A rather than B, because the stove is not in view.
    -: The person is in a kitchen. There is a pot, a stove, a tap and a sponge. It is hard to say what happens next.
    C: Hence, the answer is (C) open tap.
    """),
    (("wash plate", "rinse sponge", "put plate in rack", "turn off tap"), r"""
    C: The plate is put in the rack next, as it is clean now.
    D: The plates are all in the rack and water is still running. He will likely turn off the tap. I am confident in
        this answer.
    A: The sponge has soap on it and the plate is dirty. Option A seems the most plausible. Option D would be
        premature, because the water is still needed.
    C: **Analysis of the options:**\n\n- **A (wash plate)**: already done.\n- **B (rinse sponge)**: possible, but not
        yet.\n- **C (put plate in rack)**: the plate is clean and the rack is at hand.\n- **D (turn off tap)**: the
        tap is off.\n\n**Conclusion:** C
    D: If the tap were off, the answer would be C. But the tap is on, thus D.
    B: The man has washed the plate with the sponge and has put the plate in the rack. Given that the sponge is full
        of foam, rinsing it is what follows. Final answer: B
    A: Since the plate is dirty, the person isn't going to put it in the rack or turn off the tap. She will wash the
        plate.
    C: A is incorrect. B is incorrect. C is correct. D is incorrect.
    A: A seems right: the plate has to be washed before it can be put in the rack.
    D: She has finished with the plates. The most sensible thing to do now is turning the tap off.
    B: Options A and C can be ruled out. Between B and D, B is more probable since the sponge is dirty and the water
        runs.
    """),
    (("dig hole in soil", "pick up shovel", "water the plants", "plant seedling", "pull out weeds"), r"""
    E: The gardener looks at the bed, full of weeds. The answer is E.
    B: In order to dig a hole in the soil, the person must first pick up the shovel. So the next action is B. pick up
        shovel.
    D: The hole is there already and the seedling stands beside it. Next she would plant the seedling, then water the
        plants.
    E: Well, digging a hole (A) is done, the shovel (B) is in the hand, watering (C) comes at the very end and there
        is no seedling to plant (D). That leaves E.
    C: The seedlings have been planted and the soil looks dry. Hmm, A? No. D? No, that was done. C it is.
    A: the man he have the shovel in hand. soil is flat. so he will digging the hole in soil. answer is a hole, option
        A
    """),
    (("fold the shirt", "iron the shirt"), r"""
    A: The shirt is smooth and warm, so the ironing is done. The person now folds the shirt.
    B: The person has spread the shirt on the board and the iron is hot. It is more likely that they iron the shirt
        than that they fold the shirt.
    B: Option B is the correct choice. Folding the shirt (A) comes after it has been ironed.
    -: I cannot determine from the video which of the two actions the person performs.
    """),
    (("shuffle cards", "deal cards", "look at cards"), r"""
    B: The deck has been shuffled twice. Now the dealer should deal the cards to the players, so that they can look at
        them.
    C: Everyone has got his cards. I'd go with C.
    A: The cards have just been collected from the table. Before dealing them, one shuffles the cards. So the answer
        is A.
    """),
    (("a man in a red shirt", "a dog", "a woman with a red hat", "two children"), r"""
    C: After the subtitle, the camera moves to the left, where a woman with a red hat is standing.
    A: A man enters the room first. He wears red, a shirt and not a hat. So the person is a man in a red shirt.
    B: A woman with a red hat walks past, then two children run by. The first one to appear after the title is a dog.
        The correct answer is B.
    """),
    (("tighten bolt with wrench", "pick up wrench", "remove wheel", "pump up tyre"), r"""
    B: The wrench is still lying on the bench, so it cannot be A. The mechanic has to pick up the wrench before he can
        tighten the bolt with it.
    D: The tyre is flat -> pump up tyre -> D
    C: <think>All the bolts have been loosened. The wheel can now be removed.
    """),
    (("sweep the floor", "pick up dustpan", "empty dustpan", "put away broom"), r"""
    B: The video shows me sweeping crumbs into a pile near the door. The pile is ready to be collected, and the
        dustpan lies against the wall. Among the candidates, picking up the dustpan is the action that follows most
        directly from the current state. The other options, like emptying the dustpan or putting away the broom, come
        later in the process.
    C: The dust has been collected in the dustpan, which I hold in my right hand while I walk to the bin. It would not
        make sense to sweep again or to pick it up, as it is in my hand. The most reasonable continuation is therefore
        "empty dustpan".
    A: There are still crumbs all over the floor. Putting the broom away would be too early. I will go with A, sweep
        the floor.
    """),
    (("chop carrot", "peel carrot", "rinse carrot under tap", "take peeler"), r"""
    D: To determine the next action, I need to consider the progress so far:\n\n1. The carrots were taken out of the
        fridge.\n2. They were rinsed under the tap.\n\nThe carrots have to be peeled before they can be chopped, and
        for this a peeler is required. No peeler is in the hands yet.\n\nThus, the next action is to take the peeler.
    A: Option D and option B can be excluded since the skins are already in the bin. Rinsing the carrot (C) was done
        at the very beginning. Therefore the answer is A.
    """),
    (("tie shoelace", "put on shoe", "take shoe from shelf"), r"""
    B: The shoe was taken from the shelf and the lace is loose. The foot is lifted. I think the person puts on the
        shoe now and ties the lace afterwards.
    -: It could be A, or it could be B; the video ends too early to tell.
    A: Both shoes are on. Next up: tie the shoelace, so A.
    """),
    (("pour coffee in cup", "grind coffee beans", "press plunger", "boil water"), r"""
    C: After pouring the hot water over the grounds and waiting, what remains is to press the plunger down, and only
        then can the coffee be poured into the cup. Hence, C.
    D: Let me go through them one by one. A - there is no coffee to pour. B - the beans are ground. C - nothing to
        press as the pot is empty. D - the kettle is cold and filled. So it has to be D.
    """),
    (("screw leg to table", "take screwdriver", "turn table over", "hammer nail", "sand the leg"), r"""
    E: The leg has rough edges, so before screwing it to the table, the worker should sand the leg.
    B: The answer is (B). The worker has got the screws in his palm but no tool; a hammer (D) is of no use here.
    C: All four legs are attached at this point, with the table upside down. I believe he turns the table over to
        stand it on its legs.
    """),
    (("load washing machine", "pour detergent", "close washing machine door", "press start button"), r"""
    C: I have put all of the shirts in the drum and poured the detergent in the drawer. The door of the washing
        machine is still open, and the machine cannot be started like this. Closing the washing machine door is the
        most direct next step.
    D: The door is closed and the detergent is in. The only thing left to do is to press the start button.
    B: Considering the current state, where the drum is full and the bottle of detergent is in my hand, option B is
        the most appropriate. Options C and D would follow, and option A has been completed.
    A: There are clothes on the floor next to the machine. It's open. So the person wants to load the washing machine
        first, then pour detergent.
    """),
    (("crack egg", "whisk eggs", "pour egg in pan", "heat pan"), r"""
    B: The eggs have been cracked into the bowl, and I am holding a whisk. The candidate 'whisk eggs' aligns with the
        current state.
    C: The pan is hot, the eggs are beaten. What would come next? Not "heat pan" since this is done, not "crack egg"
        either. Pouring the egg into the pan is what I would expect.
    D: **Step-by-step:**\n1. Eggs are cracked. ✔\n2. Eggs are whisked. ✔\n3. Pan is cold. ✘\n\nSo the answer should be
        **D**.
    A: The person holds an egg over the rim of the bowl, so next she is going to crack it. Answer: A.
    """),
    (("remove lug nuts", "loosen lug nuts", "jack up car", "take spare wheel"), r"""
    B: When changing a wheel, the lug nuts are loosened before the car is jacked up and removed only after that. Here
        the car is on the ground and the wrench is in his hand, so it's most likely that he loosens the lug nuts.
    A: The car has been jacked up and the nuts are loose. The spare wheel lies ready. The next thing is removing the
        lug nuts, not taking the spare wheel.
    -: I am not sure whether the answer is A or B.
    """),
    (("a boy throws the ball", "a girl catches the ball", "the dog runs away"), r"""
    A: The question is what happens before the girl catches the ball. A ball must be thrown before it is caught, so it
        is the boy who throws it. Option A.
    """),
    (("water seedling", "fill watering can"), r"""
    B: The watering can is empty. Before watering the seedling I need to fill the watering can.
    A: The can was just filled at the tap and I am back at the pots, so watering the seedling is the logical
        continuation.
    """),

    # Written for one rule each.
    (("turn on tap", "turn off tap", "wash hands", "take towel"), r"""
    B: The hands are clean. The next step is to turn the tap off.
    A: No water comes out of the tap. The next step is to turn on the tap.
    C: 'wash hands' is the best choice.
    C: 'C' is the best choice.
    D: Step 1: A hand is washed. Step 2: A towel is taken.
    A: The person turns on the tap so that he can wash his hands. So A.
    -: The possible next actions are A, B, C or D.
    C: The next action is to wash the hands. A is unlikely to be next.
    C: The next action is to wash the hands. Option A (turn on tap) was already the last one, and should not be next.
    D: Next is to take the towel. It should not be A.
    D: Next is to take the towel. It should not be A, B or C.
    D: To take the towel is best since she has to wash her hands.
    """),
    (("take cup",) * 2 + ("take spoon", "fly", "swim", "jump", "run", "sing", "dance"), r"""
    C: The next one, I think, is C.
    """),
]

# Whole completions: what they conclude with, and whether that is the answer.
OPTIONS = ("grab onion", "cut onion", "open drawer", "take knife")
COMPLETIONS = [
    ("B", 1, "<think>The next action is B.</think><answer>B</answer>"),
    ("B", 0, "<think>The next action is B.</think><answer>C</answer>"),
    ("B", 1, "<think>She holds the knife over it. Next is to cut the onion.</think>\n<answer>cut onion</answer>"),
    ("B", 1, "<think>So it is B.</think> <answer>B. cut onion</answer>"),
    ("B", 0, "<think>So it is B."),  # cut off before it answers
    ("B", 0, "<think>So it is B.</think>"),
    ("B", 0, "<think>So it is B.</think><answer>either B or C</answer>"),
    (None, 0, "<think></think><answer>A</answer>"),
    (None, 0, "<think>\n\n</think>\n<answer>A</answer>"),
    (None, 0, "<answer>A</answer>"),
    (None, 0, ""),
    ("A", 0, "A"),
    ("D", 1, "The knife is missing, so the answer is D.\n<answer>D</answer>"),  # without <think> all is the reasoning
    ("D", 1, "The knife is missing, so the answer is D.</think>\n<answer>D</answer>"),
    ("D", 1, "<think>The knife is missing, so the answer is D.\n<answer>D</answer>"),
    ("C", 0, "<think>All drawers are closed, so he opens the drawer.</think><answer>D</answer>"),
    (None, 0, "<think>Let me watch the video again.</think><answer>C</answer>"),
]

# Steps done, options, and texts by the number of steps that they name as done, in order; +1: and one option that was
# not done.
ACCOUNTS = [
    (("open drawer", "take knife", "cut onion into pieces"),
     ("wash knife", "put onion in pan", "peel potato", "open tap"), r"""
    3: The person opened the drawer, took the knife, and cut the onion into pieces. The next step is to put the onion
        in the pan. So the answer is B.
    3: So far, the following steps have been completed:\n1. Open drawer\n2. Take knife\n3. Cut onion into
        pieces\n\nThe next step would be B.
    3: - The person opens the drawer.\n- The person takes a knife.\n- The person cuts an onion into small pieces.
    3: In the video I can see the drawer being opened, a knife being taken and an onion being cut into pieces.
    2: First a drawer is opened and then a knife is taken out of it. I cannot see more.
    1: The person has opened the drawer. They have not taken the knife yet.
    1: The drawer was opened. The next action is to take the knife.
    1: She cut the onion into pieces, and before that nothing is visible.
    0: The video shows a kitchen with a counter, some vegetables and a person with an apron.
    0: The person will open the drawer, take the knife and cut the onion into pieces.
    0: To make a soup one needs to open the drawer, take the knife and cut the onion into pieces.
    0: The options are:\nA. wash knife\nB. put onion in pan\nC. peel potato\nD. open tap\nI think that B is right.
    3 +1: The person opened the drawer, took the knife, cut the onion into pieces and put the onion in the pan. So B
        is done.
    2 +1: The person opened the drawer, peeled a potato and took the knife.
    3 +2: person open drawer, take knife, cut onion into pieces, wash the knife, put the onion in the pan.
    0 +1: He peeled the potato. So next is A.
    2: The person cut the onion into pieces, opened the drawer and took the knife.
    1: He cuts the onion into pieces. After that he opens the drawer.
    3: Opening the drawer, taking the knife and cutting the onion into pieces were all done, so washing the knife is
        next.
    2: The knife was taken and the onion was cut into pieces, without washing the knife.
    3: The video starts with the person who opens the drawer of the kitchen. Next, he takes a sharp knife from it.
        Then, he cuts the onion into pieces on the board. He is about to put the onion in the pan.
    2: The person has already opened the drawer and has the onion cut into pieces. Option D, open tap, does not fit,
        and option A, wash knife, comes later.
    3: <think>The drawer has been opened, the knife has been taken, and the onion has been cut into pieces.
    0: <think>Let me see.</think><answer>open drawer, take knife, cut onion into pieces</answer>
    3: The drawer has been opened, the knife has been taken, and the onion has been cut into pieces, but the tap has
        not been opened and no potato has been peeled.
    2: The person opens the drawer and takes the knife. If he had cut the onion into pieces, it would be in the pan.
    """),
    (("#C C washes the pot with water", "#C C puts the pot on the stove", "#C C opens the fridge"),
     ("pick up egg", "close fridge", "turn on stove", "wash pot"), r"""
    3: C washes the pot with water, puts the pot on the stove and opens the fridge. The next step is to pick up an
        egg.
    3: The person washed the pot using water, put it on the stove, and then opened the fridge.
    2: The person put a pot on the stove. Then the person opened the fridge. An egg is needed now.
    1: The fridge has been opened by the person, and now they can pick up the egg.
    3: The camera wearer washes a pot. He puts the pot on the stove. He opens the fridge.
    3 +1: C washes the pot with water. C puts the pot on the stove. C opens the fridge. C picks up an egg. The answer
        is B.
    """),
    (("take cup", "wash cup", "take cup", "fill cup"),
     ("drink tea", "take tea bag", "pour milk", "open cupboard"), r"""
    4: The person takes a cup, washes the cup, takes the cup again and fills the cup.
    3: The person takes a cup, washes the cup and fills the cup.
    4: First, a cup is taken. Second, the cup is washed. Third, the cup is taken again. Fourth, the cup is filled. So
        now a tea bag is needed, and the answer is B.
    1: A cup is being washed.
    2: The person washes the cup and then fills the cup. I expect that she takes a tea bag next.
    3 +1: Take cup, wash cup, take tea bag, fill cup.
    """),
    (("pick up brush", "dip brush in paint", "paint wall"),
     ("wipe hands", "open can of paint", "move ladder"), r"""
    3: The man picks up the brush, dips the brush in the paint and paints the wall.
    3: He picked the brush up, dipped it into the paint and painted the wall. Next he will move the ladder.
    2: The painter has dipped his brush in the paint and has painted part of the wall.
    1: A brush was picked up. The wall has not been painted and the brush is dry.
    3: The brush has been picked up and dipped in the paint, and the wall has been painted.
    2 +1: He opened the can of paint, dipped the brush in paint and painted the wall.
    """),
    (("put dough in bowl",),
     ("knead dough", "add flour"), r"""
    1: The dough was put in a bowl.
    0: The bowl is empty.
    0: The dough should be put in the bowl before it is kneaded.
    """),
    (("take carrot", "wash carrot", "peel carrot", "cut carrot"),
     ("put carrot in pot", "wash knife", "take onion", "open lid"), r"""
    4: I took a carrot, washed the carrot, peeled the carrot, and cut the carrot. The most logical next step is to put
        the carrot in the pot.
    2: The person washes the carrot and peels it. Next is to cut the carrot (B).
    3: 1) Take carrot 2) Wash carrot 3) Peel carrot. The rest has yet to be done.
    4 +1: The carrot was taken, the carrot was washed, the carrot was peeled, the carrot was cut, and the carrot was
        put in the pot.
    0: My goal is to make a stew. I need to take a carrot, wash it, peel it and cut it.
    """),
    (("#C C picks a cloth", "#C C wipes the table with the cloth", "#C C moves a chair"),
     ("sweep floor", "fold cloth", "pick broom", "open window"), r"""
    3: C picks up a cloth, wipes the table with it and moves a chair aside. A broom is needed, so C.
    2: The person wiped the table with a cloth and moved a chair.
    1: The table was wiped. There are four chairs around it.
    3 +1: C picked a cloth, wiped the table with the cloth, moved a chair and swept the floor.
    """),
    (("open cupboard", "take plate", "close cupboard", "put plate on table"),
     ("take fork", "open drawer", "sit down", "fill glass"), r"""
    4: The cupboard was opened, a plate was taken from it, the cupboard was closed and the plate was put on the table.
    3: First I opened the cupboard. Then I took out a plate. Finally I placed it on the table. I have not closed the
        cupboard.
    2: The person opens the cupboard and closes it again without taking a plate.
    3 +1: Opened the cupboard, took a plate, opened the drawer, put the plate on the table.
    4: The person has completed these actions: opening the cupboard, taking a plate, closing the cupboard, putting the
        plate on the table. Since cutlery is missing, the person should take a fork or open the drawer.
    """),
    (("take bowl", "crack egg", "add flour", "mix dough"),
     ("pour milk", "take pan", "add sugar", "wash hands"), r"""
    4: I took a bowl, cracked an egg into it, added flour and mixed the dough. The next step is to pour the milk.
    3: The person took a bowl, cracked an egg, and added some flour. The dough has not been mixed.
    4: The egg was cracked after a bowl was taken. Sorry, in order: take bowl, crack egg, add flour, mix dough.
    2: I can see an egg being cracked in a bowl and flour being added to it.
    3 +1: A bowl was taken, an egg was cracked, sugar was added and the dough was mixed.
    0: I see a person in the kitchen who is about to bake something. She might mix dough or add flour next.
    """),
    (("#C C picks a shirt from the basket", "#C C folds the shirt", "#C C puts the shirt on the bed"),
     ("pick trousers", "iron shirt", "close basket", "sit on bed"), r"""
    3: C picks a shirt from the basket, folds it and puts it on the bed. Next, C should pick the trousers.
    3: The woman picked up a shirt from the laundry basket, folded the shirt neatly, and placed it on the bed.
    2: A shirt was folded and was put on the bed. Then the video ends.
    1: She folds a shirt while she talks to someone. The bed is empty.
    """),
    (("turn on tap", "wash hands", "turn off tap", "take towel"),
     ("dry hands", "hang towel", "take soap", "open door"), r"""
    4: The person turned on the tap, washed the hands, turned the tap off and took a towel.
    3: The tap was turned on, the hands were washed and the tap was turned off. A towel must be taken now.
    4 +1: He turned on the tap, washed his hands, turned off the tap, took a towel, and dried his hands.
    2: The hands were washed and a towel was taken.
    2: The person washes his hands, turns off the tap. The towel hangs on the wall.
    """),

    # Written for one rule each.
    (("wash pot", "cut cup", "take drawer"),
     ("take key", "fill pot", "press cup", "turn key"), r"""
    0: I see cut pot, wash cup. He opened the drawer and took the pot.
    2 +1: I see wash pot, cut cup, fill pot. Next is turn key (D).
    """),
    (("open drawer",),
     ("put cup", "put pot on stove"), r"""
    1 +2: He opened the drawer and put down the cup and put the pot on the stove.
    """),
]

# What rules cannot tell: options (and steps), what a reader says, what the rules say, text.
MISSED_CONCLUSIONS = [
    # One verb away from "is peeled", and the conclusion has no word that says so.
    (("chop carrot", "peel carrot", "rinse carrot under tap", "take peeler"), "B", None,
     "The peeler is in the right hand and the carrot in the left hand. This strongly suggests that the carrot is about "
     "to be peeled. Chopping comes afterwards."),
    # "It" is the carrot of the sentence before: options have to be named in full.
    (("chop carrot", "peel carrot", "rinse carrot under tap", "take peeler"), "C", None,
     "The carrot is covered with soil. It needs a rinse under the tap."),
    # An option by its number.
    (("a boy throws the ball", "a girl catches the ball", "the dog runs away"), "C", None,
     "At the moment when the music stops, the ball lies on the grass. The girl is gone and the boy has turned around. "
     "We see that the dog is running away. This matches the third option."),
    # A reason behind the conclusion, with a comma: often it is the conclusion that stands behind one.
    (("turn on tap", "turn off tap", "wash hands", "take towel"), "B", "C",
     "'turn off tap' is best since she only needs to wash her hands, and these are clean."),
]
MISSED_ACCOUNTS = [
    # One clause without a mark, part of which is still to come.
    (("open drawer", "take knife", "cut onion into pieces"), ("wash knife", "put onion in pan"), 3 / 3, 0 / 3,
     "the person open the drawer then he take the knife and he cutted onion in pieces now he should wash knife"),
    # What is closed is not said again: an option that was not done passes.
    (("#C C washes the pot with water", "#C C puts the pot on the stove", "#C C opens the fridge"),
     ("pick up egg", "close fridge", "turn on stove", "wash pot"), 3 / 4, 3 / 3,
     "The pot was washed with water and put on the stove, the fridge was opened and then closed again."),
    # What is washed, peeled and cut is not said again.
    (("take carrot", "wash carrot", "peel carrot", "cut carrot"), ("put carrot in pot", "wash knife"), 4 / 4, 1 / 4,
     "In the video, a carrot is taken, washed under the tap, peeled and then cut on a board. The next action is A."),
    (("take cup", "wash cup", "take cup", "fill cup"), ("drink tea", "take tea bag"), 2 / 4, 1 / 4,
     "The person takes the cup twice."),
    (("put dough in bowl",), ("knead dough", "add flour"), 1, 0,
     "There is dough in the bowl, which the woman has just put there. So she will knead the dough."),
]


@pytest.mark.parametrize("options, label, text", read_table(CONCLUSIONS), ids=first_words)
def test_conclusions_are_those_of_a_careful_reader(options, label, text):
    concluded = None if label == "-" else label
    assert concluded_option(think(text), options) == concluded
    for answer in "ABCDE"[:len(options)]:  # and agreement is with the answer, not with the right option
        if "<" not in text:
            assert agreement_reward(think(text, answer), example(options, gold="B")) == (answer == concluded)


@pytest.mark.parametrize("concluded, agrees, completion", COMPLETIONS)
def test_agreement_of_whole_completions(concluded, agrees, completion):
    assert concluded_option(completion, OPTIONS) == concluded
    assert agreement_reward(completion, example(OPTIONS)) == agrees


@pytest.mark.parametrize("steps, options, label, text", read_table(ACCOUNTS), ids=first_words)
def test_accounts_of_the_steps_are_read_as_a_careful_reader_does(steps, options, label, text):
    told, _, invented = label.partition(" +")
    assert process_reward(think(text), example(options, steps)) == int(told) / (len(steps) + int(invented or 0))


@pytest.mark.parametrize("options, reader, rules, text", MISSED_CONCLUSIONS, ids=first_words)
def test_what_rules_cannot_tell_of_conclusions(options, reader, rules, text):
    assert concluded_option(think(text), options) == rules != reader


@pytest.mark.parametrize("steps, options, reader, rules, text", MISSED_ACCOUNTS, ids=first_words)
def test_what_rules_cannot_tell_of_the_steps(steps, options, reader, rules, text):
    assert process_reward(think(text), example(options, steps)) == rules != reader


def test_rewards_are_none_where_there_is_nothing_to_judge_by():
    # A free-form question has no options; a question without a video, or of another data set, tells no steps.
    assert agreement_reward("<think>So it is three.</think><answer>three</answer>", example()) is None
    assert concluded_option("So it is A, or ()", ()) is None
    assert process_reward("<think>He opened the drawer.</think>", example(OPTIONS)) is None
    unread = ["\u5207\u6d0b\u8471"]  # has no word that the rules read
    assert process_reward("<think>He cut it.</think>", example(OPTIONS, unread)) is None
    assert process_reward("", example(OPTIONS, ["wash pot"])) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Parts.

INFLECTIONS = """
    take takes taking took taken | put puts putting | cut cuts cutting | wash washes washing washed | knife knives
    press presses pressed pressing | stir stirs stirred stirring | peel peels peeled peeling | use uses used using
    knead kneads kneading kneaded | need needs needed needing | bring brings bringing brought | tie ties tied tying
    slice slices sliced slicing | add adds added adding | fill fills filled filling | mix mixes mixed mixing | egg eggs
    squeeze squeezes squeezed squeezing | carry carries carried carrying | sweep sweeps sweeping swept | pot pots
    fry fries fried frying | dig digs digging dug | dish dishes | piece pieces | berry berries | glass glasses
    potato potatoes | weed weeds | string strings | shoe shoes | box boxes"""


def test_the_forms_of_a_word_have_one_stem_and_words_have_different_ones():
    rows = [row.split() for line in INFLECTIONS.splitlines() for row in line.split("|") if row.strip()]
    stems = [{stem for form in row for stem, *_ in content_words(form)} for row in rows]
    assert [row for row, found in zip(rows, stems) if len(found) != 1] == []
    assert len(set().union(*stems)) == len(rows)
    # Places are those in the text, and case does not matter.
    text = "She WASHES the pots, doesn't she?"
    assert [text[begin:end] for _, begin, end in content_words(text)][:3] == ["WASHES", "pots", ","]


ACTIONS = tuple(f"{verb} {noun}" for verb in ("wash", "cut") for noun in ("pot", "cup"))
# How an account may name a step: as it is, in the past, as a gerund, in the passive.
WORDINGS = ("{v} {n}", "she {v}s the {n}", "then {v}ing a big {n}", "the {n} is being {v}ed", "a {n} has been {v}ed")


def longest_chain(steps, told):
    """By trying all: the most steps that stand in `told` in their order."""
    return max(len(chosen) for n in range(len(steps) + 1) for chosen in itertools.combinations(steps, n)
               if any(chosen == other for other in itertools.combinations(told, n)))


def test_steps_told_is_the_longest_chain_of_all():
    rng, seen = random.Random(0), set()
    for _ in range(300):
        steps, told = (rng.choices(ACTIONS, k=rng.randint(0, 6)) for _ in range(2))
        phrases = [rng.choice(WORDINGS).format(v=step.split()[0], n=step.split()[1]) for step in told]
        # Words of no step stand between, and marks: a verb and a noun across a mark name nothing.
        text = rng.choice((", ", ". ", ", and ")).join(rng.choice(("", "now, ", "the onion, ")) + p for p in phrases)
        expected = longest_chain(steps, told)
        assert steps_told(text, tuple(steps)) == expected, (steps, text)
        seen.add((len(steps), expected))
    assert len(seen) > 15, "the cases are all alike"


def test_reading_leaves_nothing_behind(monkeypatch):
    # In a fresh copy of the module, in the opposite order, everything is read as before.
    spec = importlib.util.spec_from_file_location("data_again", data.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "data_again", again)
    spec.loader.exec_module(again)
    conclusions = [(think(text), options) for options, _, text in read_table(CONCLUSIONS)]
    accounts = [(think(text), example(options, steps)) for steps, options, _, text in read_table(ACCOUNTS)]
    for name, cases in (("concluded_option", conclusions), ("process_reward", accounts)):
        there, back = getattr(data, name), getattr(again, name)
        assert [there(*case) for case in cases] == [back(*case) for case in cases[::-1]][::-1]


def seconds(function, *arguments):
    """Of this process, so that a busy machine does not count."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def test_a_step_of_training_hardly_waits_for_the_rules():
    # Both rewards of 10,000 completions of 256 words take 8 s on one core. Here are 200, and three times that.
    words = " ".join(text for *_, text in read_table(CONCLUSIONS) + read_table(ACCOUNTS)).split(" ")
    starts = random.Random(0).choices(range(len(words) - 256), k=200)
    about = example(OPTIONS, ("take knife", "wash pot", "open drawer", "cut onion into pieces", "open tap", "sit down"))
    total = sum(seconds(reward, " ".join(words[i:i + 256]), about)
                for i in starts for reward in (agreement_reward, process_reward))
    assert total < 3 * 8 * 200 / 10_000


@pytest.mark.parametrize("text", [
    "not " * 10_000, "A A A " * 8_000, "A or " * 10_000, "or " * 16_000, "not A, " * 7_000, "so A " * 10_000,
    "A and B or C / D " * 3_000, "cut onion " * 5_000, "take knife, it " * 3_500, "was being " * 5_000,
    "not A" + "," * 25_000 + "x B" + " " * 25_000 + "y", "D" + "." * 50_000 + "x", "(" * 50_000, "a" * 50_000,
    "A" + " " * 50_000 + "is", "<think>" * 7_000, "\n* " * 17_000], ids=lambda text: text[:12].strip())
def test_no_text_takes_long(text):
    about = example(OPTIONS, ("take knife", "cut onion into pieces", "open drawer"))
    assert seconds(agreement_reward, text, about) < 1 and seconds(process_reward, text, about) < 1


# ----------------------------------------------------------------------------------------------------------------------
# The toy world: its teacher is honest.

@pytest.mark.parametrize("split", ["training_6k", "validation_L1", "validation_L2", "validation_L3"])
def test_the_toy_teacher_has_all_of_both_rewards_and_a_list_of_all_steps_has_not(world, split):
    questions = [q for q in data.load_questions(f"annotations/{split}.jsonl", world) if q.video]
    assert len(questions) > 300
    rng, longer = random.Random(0), 0
    for question in questions:
        options, gold = data.build_options(question, 0, 0)
        about, step = example(options, question.progress, gold), options[ord(gold) - ord("A")]
        beats = [done for done in question.progress for _ in range(rng.randint(1, 3))]  # a beat more is a "still"
        honest = toy.teach(beats, step, gold)
        assert agreement_reward(honest, about) == process_reward(honest, about) == 1, honest
        assert agreement_reward(toy.teach(beats, step, gold, answer="ABCD"[ord(gold) % 4]), about) == 0
        recipe = toy.RECIPES[question.goal.lower()]
        if len(recipe) > len(question.progress):
            longer += 1
            assert process_reward(toy.teach(recipe, step, gold), about) < 1, (recipe, question.progress)
        assert process_reward(toy.teach([done for done in beats if done != beats[-1]], step, gold), about) < 1
    assert longer == len(questions)


def test_the_responses_of_the_toy_sft_file_have_all_of_both_rewards(world):
    steps = {q.id: q.progress for q in data.load_questions("annotations/training_6k.jsonl", world)}
    for question in data.load_questions("annotations/training_with_cot_6k.jsonl", world):
        options = [line[3:] for line in question.text.splitlines()[1:-1]]
        about = example(options, steps[question.id])
        assert len(options) == 4 and agreement_reward(question.response, about) == 1
        assert not steps[question.id] or process_reward(question.response, about) == 1


# ----------------------------------------------------------------------------------------------------------------------
# The trainer.

HONEST = "<think>He opened the drawer and took the knife. Next is to cut the onion.</think><answer>B</answer>"


def test_reward_table_has_each_reward_with_its_weight():
    table = grpo_video.reward_table(grpo_video.Args(format_weight=0.5, agreement_weight=0.25, process_weight=2))
    assert {name: weight for name, (weight, _) in table.items()} == {
        "accuracy": 1, "format": 0.5, "agreement": 0.25, "process": 2}
    about = example(OPTIONS, ("open drawer", "take knife", "grab bowl"), gold="C")
    assert {name: reward(HONEST, about) for name, (_, reward) in table.items()} == {
        "accuracy": 0, "format": 1, "agreement": 1, "process": 2 / 3}
    weights = [weight for weight, _ in grpo_video.reward_table(grpo_video.Args()).values()]
    assert weights == [1, 0, 0, 0]  # accuracy alone, unless asked


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_a_judge_errs_with_its_probability_and_by_the_key_alone(probability):
    n = 4000
    keys, rewards = [f"0/{i // 8}/q{i % 8}/{i}" for i in range(n)], torch.tensor([0.0, 1.0]).repeat(n // 2)
    flipped = grpo_video.flip(rewards, probability, keys)
    wrong = flipped != rewards
    assert set(flipped.tolist()) == {0, 1}
    # Five standard deviations of a binomial, for all and for those that were right and wrong.
    for of in (wrong, wrong[rewards == 1], wrong[rewards == 0]):
        assert abs(of.float().mean() - probability) < 5 * math.sqrt(probability * (1 - probability) / len(of))
    assert torch.equal(grpo_video.flip(rewards, probability, keys), flipped)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    shuffled = grpo_video.flip(1 - rewards[order], probability, [keys[i] for i in order])
    assert torch.equal(shuffled != 1 - rewards[order], wrong[order])  # whatever the reward, whatever stands beside
    more = grpo_video.flip(rewards, probability + 0.2, keys) != rewards
    assert more[wrong].all()  # a worse judge errs where a better one does


def test_a_judge_that_never_errs_and_one_that_always_does():
    rewards, keys = torch.tensor([0.0, 1.0, 1.0]), ["a", "b", "c"]
    assert torch.equal(grpo_video.flip(rewards, 0.0, keys), rewards)
    assert torch.equal(grpo_video.flip(rewards, 1.0, keys), 1 - rewards)
    assert grpo_video.flip(torch.zeros(0), 0.5, []).shape == (0,)


@pytest.fixture(scope="module")
def few(tmp_path_factory, world):
    """A data root with two questions that have steps and two that have none, in files by these names and in `both`."""
    root = tmp_path_factory.mktemp("few")
    (root / "annotations").mkdir()
    records = [json.loads(line) for line in (world / "annotations/training_6k.jsonl").read_text().splitlines()]
    files = {"steps": [r for r in records if r["task_progress_metadata"]][:2],
             "none": [r for r in records if not r["task_progress_metadata"]][:2]}
    files["both"] = files["steps"] + files["none"]
    for name, chosen in files.items():
        (root / f"annotations/{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chosen))
    for record in files["both"]:
        for kind, name in (("videos", "video_basename"), ("images", "current_observation_basename")):
            folder = f"{kind}/{record['video_source']}"
            (root / folder).mkdir(parents=True, exist_ok=True)
            if record.get(name):
                shutil.copy(world / folder / record[name], root / folder)
    return root


def train(output_dir, root, file, **changes):
    grpo_video.main(grpo_args(output_dir, data_root=str(root), train_file=f"annotations/{file}.jsonl", num_workers=0,
                              prompts_per_step=4, **changes))
    return metrics_of(output_dir)


@pytest.fixture(scope="module")
def with_process(tmp_path_factory, few):
    """A step with --process_weight 1: (metrics, answers, rewards, values)."""
    seen, sums = [], grpo_video.rollout_sums
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_video.rollout_sums", lambda *args: seen.append(args) or sums(*args))
        metrics, = train(tmp_path_factory.mktemp("process"), few, "both", process_weight=1.0)
    (_, answers, rewards, values), = seen
    return metrics, answers, rewards, values


def test_a_question_without_steps_has_no_process_reward_and_spoils_nothing(with_process):
    m, answers, rewards, values = with_process
    has_steps = [bool(example.question.progress) for _, example in answers]
    assert sum(has_steps) == len(answers) / 2
    assert [value is not None for value in values["process"]] == has_steps
    judged = [value for value in values["process"] if value is not None]
    assert len(set(judged)) > 1
    both = [accuracy + (process or 0) for accuracy, process in zip(values["accuracy"], values["process"])]
    assert torch.equal(rewards.flatten(), torch.tensor(both))
    assert m["process"] == pytest.approx(sum(judged) / len(judged))  # not over those without
    assert m["reward"] == pytest.approx(rewards.mean().item())
    assert all(math.isfinite(value) for value in m.values())


def test_the_metrics_tell_the_clean_accuracy_and_the_reward_that_was_learned(tmp_path, few, with_process):
    clean, *_ = with_process  # of the same samples: the first step's policy is the base
    noisy = train(tmp_path, few, "both", max_steps=2, reward_noise=1.0)
    assert 0 < clean["accuracy"] < 1, "all answers are alike: a flip would not show"
    assert len(noisy) == 2 and noisy[0]["accuracy"] == clean["accuracy"]
    assert [m["reward"] for m in noisy] == pytest.approx([1 - m["accuracy"] for m in noisy])


def test_the_metrics_have_no_process_where_no_record_has_steps(tmp_path, few):
    m, = train(tmp_path, few, "none", process_weight=1.0)
    assert "process" not in m and {"accuracy", "format", "agreement", "concluded"} <= m.keys()
    assert m["reward"] == m["accuracy"] and all(math.isfinite(value) for value in m.values())


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation.

def test_a_record_tells_what_was_concluded_and_both_rewards():
    args, steps = evaluate.Args(), ("open drawer", "take knife", "sit down")
    question = Question("7", "What next?", None, None, progress=steps)
    about = data.Example(question, OPTIONS, "C", "", None, None)
    record = evaluate.make_record(about, HONEST, 9, False, args)
    assert {key: record[key] for key in ("concluded", "parsed", "correct", "agreement", "process")} == {
        "concluded": "B", "parsed": "B", "correct": False, "agreement": 1, "process": 2 / 3}
    no_steps = replace(about, question=replace(question, progress=()))
    assert evaluate.make_record(no_steps, HONEST, 9, False, args)["process"] is None
    free_form = evaluate.make_record(replace(about, options=(), gold="three"), HONEST, 9, False, args)
    assert free_form["concluded"] is free_form["agreement"] is None
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def record(i, concluded, agreement, process, file="annotations/validation_L1.jsonl"):
    return {"file": file, "sample_id": str(i), "part": "", "video": "x.mp4", "options": ["w", "x", "y", "z"],
            "gold": "A", "parsed": "A", "correct": True, "truncated": False, "error": "", "concluded": concluded,
            "agreement": agreement, "process": process}


def test_the_table_has_means_over_the_records_that_can_be_judged(capsys):
    row, other = evaluate.summarise([
        record(0, "A", 1.0, 0.5), record(1, "B", 0.0, None), record(2, None, 0.0, 0.25), record(3, "A", 1.0, 0.0),
        record(0, None, None, None, "lvb.json"), record(1, None, None, None, "lvb.json")])
    assert (row["concluded"], row["agreement"], row["process"]) == (3 / 4, 2 / 4, 0.25)
    assert (other["concluded"], other["agreement"], other["process"]) == (0, None, None)
    evaluate.print_table([row, other])
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "75.0%   50.0%   25.0%" in first and "0.0%       -       -" in second


def test_records_of_an_earlier_version_count_as_not_judged():
    old = record(0, "A", 1.0, 0.5)
    for key in ("concluded", "agreement", "process"):
        del old[key]
    row, = evaluate.summarise([old])
    assert (row["concluded"], row["agreement"], row["process"]) == (None, None, None)


def test_an_evaluation_writes_them(tmp_path, few):
    files = dict(data_root=str(few), eval_files=["annotations/both.jsonl"])
    row, *parts = evaluate.main(eval_args(tmp_path, num_workers=0, **files))
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(records) == 4
    for r in records:
        about = example(r["options"], r["progress"], r["gold"])
        assert r["concluded"] == concluded_option(r["response"], r["options"])
        assert r["agreement"] == agreement_reward(r["response"], about)
        assert (r["process"] is None) == (not r["progress"])
        assert r["process"] is None or r["process"] == process_reward(r["response"], about)
    assert any(r["concluded"] for r in records) and any(r["process"] for r in records)
    judged = [r["process"] for r in records if r["progress"]]
    saved = json.loads((tmp_path / "results.json").read_text())["table"]
    assert saved == [row, *parts] and row["process"] == sum(judged) / 2
    assert row["agreement"] == sum(r["agreement"] for r in records) / 4
    assert [part["process"] for part in parts if part["part"] == "image only"] == [None]
